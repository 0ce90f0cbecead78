"""Stand-ins for Transformer Engine's kernels over lists of tensors: Adam, norms, scaling."""

import torch

from tests.te.rules import refuse

DECOUPLED = 1  # weight decay applied to the weights, not to the gradient
STATES = (torch.float32, torch.bfloat16)


def multi_tensor_adam(
    chunk, noop, lists, lr, beta1, beta2, epsilon, step, mode, bias_correction, decay
):
    """Update lists of weights, moments and optional main weights, from gradients."""
    if noop.item():
        return
    _check_lists(lists, (4, 5))
    for gradient, weight, first, second, *main in zip(*lists, strict=True):
        refuse("moments are float32 or bfloat16", {first.dtype, second.dtype} <= {*STATES})
        refuse("main weights are float32", all(x.dtype == torch.float32 for x in main))
        values = (main[0] if main else weight).float()
        numbers = (lr, beta1, beta2, epsilon, step, mode, bias_correction, decay)
        updated = _adam(gradient.float(), values, first, second, numbers)
        weight.copy_(updated)
        for x in main:
            x.copy_(updated)


def multi_tensor_adam_param_remainder(
    chunk, noop, lists, lr, beta1, beta2, epsilon, step, mode, bias_correction, decay
):
    """Update bfloat16 weights whose main weights keep only their lower 16 bits."""
    if noop.item():
        return
    _check_lists(lists, (5,))
    for gradient, weight, first, second, lower in zip(*lists, strict=True):
        refuse("weights and remainders", weight.dtype == torch.bfloat16, lower.dtype == torch.int16)
        bits = weight.view(torch.int16).to(torch.int32) - (lower < 0).to(torch.int32)
        bits = (bits << 16) | (lower.to(torch.int32) & 0xFFFF)
        numbers = (lr, beta1, beta2, epsilon, step, mode, bias_correction, decay)
        updated = _adam(gradient.float(), bits.view(torch.float32), first, second, numbers)
        bits = updated.view(torch.int32)
        low = (bits & 0xFFFF).to(torch.int16)
        lower.copy_(low)
        high = (bits >> 16) + (low < 0).to(torch.int32)
        weight.copy_(high.to(torch.int16).view(torch.bfloat16))


def multi_tensor_scale(chunk, noop, lists, scale):
    """Write scaled values from the first list to the second; flag non-finite values."""
    _check_lists(lists, (2,))
    for source, target in zip(*lists, strict=True):
        scaled = source.float() * scale
        target.copy_(scaled)
        if not torch.isfinite(scaled).all():
            noop.fill_(1)


def multi_tensor_scale_tensor(chunk, noop, lists, scale):
    """Do the same with a scale on the device."""
    refuse("the scale is one number", scale.numel() == 1, scale.dtype == torch.float32)
    multi_tensor_scale(chunk, noop, lists, scale)


def multi_tensor_l2norm(chunk, noop, lists, per_tensor):
    """Return the norm of all tensors, and of each."""
    _check_lists(lists, (1,))
    each = torch.stack([x.double().norm() for x in lists[0]])
    return each.norm().float()[None], each.float() if per_tensor else torch.zeros(0)


def _check_lists(lists, counts):
    refuse("the number of lists", len(lists) in counts)
    refuse("tensors are contiguous", all(x.is_contiguous() for part in lists for x in part))
    for tensors in zip(*lists, strict=True):
        refuse("tensors of a place have one size", len({x.numel() for x in tensors}) == 1)


def _adam(gradient, values, first, second, numbers):
    """Return the updated values; mutates the moments."""
    lr, beta1, beta2, epsilon, step, mode, bias_correction, decay = numbers
    if mode != DECOUPLED:
        gradient = gradient + decay * values
    first.copy_(beta1 * first.float() + (1 - beta1) * gradient)
    second.copy_(beta2 * second.float() + (1 - beta2) * gradient.square())
    rest1, rest2 = (1 - beta1**step, 1 - beta2**step) if bias_correction else (1.0, 1.0)
    update = (first.float() / rest1) / ((second.float() / rest2).sqrt() + epsilon)
    if mode == DECOUPLED:
        update = update + decay * values
    return values - lr * update
