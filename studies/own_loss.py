import torch


def loss(output, target):
    p = torch.softmax(output, dim=1)[:, 1]
    return -(target * torch.log(p) + (1 - target) * torch.log(1 - p)).mean()
