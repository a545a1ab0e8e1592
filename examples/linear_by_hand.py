"""Softmax regression on handwritten digits, trained with the explicit pair and without autograd.

The weight (64 pixels, 10 classes) is in CP format. The step is written out as one would write it
for hardware that has no autograd: forward, gradient of the loss, backward, update.
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor

from polyadic.functional import cp_linear_backward, cp_linear_forward
from polyadic.init import cp_orthonormal_, torch_std

IN_SHAPE, OUT_SHAPE, RANK = (8, 8), (2, 5), 16  # the image's rows and columns; the classes as 2 x 5
TEST, BATCH, STEPS, RATE = 450, 64, 600, 0.1


def step(x: Tensor, labels: Tensor, ins: list[Tensor], outs: list[Tensor], bias: Tensor) -> float:
    """One step of gradient descent on the mean cross-entropy, in place; returns the loss."""
    y, saved = cp_linear_forward(x, ins, outs)
    log_p = torch.log_softmax(y + bias, dim=1)
    rows = torch.arange(len(labels))
    loss = -log_p[rows, labels].mean()

    grad_y = log_p.exp()  # d loss / d y = (p - 1[label]) / B
    grad_y[rows, labels] -= 1
    grad_y /= len(labels)

    _, grad_ins, grad_outs = cp_linear_backward(grad_y, saved)
    for parameter, grad in zip(
        [*ins, *outs, bias], [*grad_ins, *grad_outs, grad_y.sum(0)], strict=True
    ):
        parameter -= RATE * grad
    return loss.item()


def main() -> float:
    """Train, print the loss and the accuracy on unseen digits, and return the accuracy."""
    torch.manual_seed(0)
    pixels, classes = load_digits(return_X_y=True)
    order = torch.randperm(len(classes))
    x = torch.as_tensor(pixels, dtype=torch.float32)[order] / 16
    labels = torch.as_tensor(classes)[order]

    factors = [torch.empty(mode, RANK) for mode in (*IN_SHAPE, *OUT_SHAPE)]
    cp_orthonormal_(factors, torch_std(x.shape[1]))
    ins, outs, bias = factors[:2], factors[2:], torch.zeros(10)
    stored = sum(factor.numel() for factor in factors)
    print(f"{stored} numbers in the factors, {x.shape[1] * 10} in the dense weight")

    for i in range(STEPS):
        chosen = torch.randint(TEST, len(x), (BATCH,))
        loss = step(x[chosen], labels[chosen], ins, outs, bias)
        if i % 100 == 0 or i == STEPS - 1:
            print(f"step {i:4d}  loss {loss:.3f}")

    y, _ = cp_linear_forward(x[:TEST], ins, outs)
    accuracy = (y + bias).argmax(1).eq(labels[:TEST]).float().mean().item()
    print(f"accuracy on {TEST} unseen digits: {100 * accuracy:.1f} %")
    return accuracy


if __name__ == "__main__":
    main()
