"""What an experienced person looks at before the recipe: one check a file."""
