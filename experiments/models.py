"""Three small image classifiers in Flax: a perceptron, a convolutional net and ResNet-18.

All take images (batch, height, width, channels), already normalised, and return logits. Only
ResNet-18 has a state besides its parameters (BatchNorm's running averages): `train=True` uses the
statistics of the current batch, which each worker computes from its own share.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

NAMES = ("mlp", "cnn", "resnet18")


class MLP(nn.Module):
    """Dense layers of these widths, each followed by a ReLU, and a last one without."""

    classes: int
    hidden: tuple[int, ...] = (128,)

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        logits = nn.Dense(self.classes)  # first, because names count, and with them initial values
        x = images.reshape(len(images), -1)
        for width in self.hidden:
            x = nn.relu(nn.Dense(width)(x))
        return logits(x)


class CNN(nn.Module):
    """Two 3x3 convolutions, each followed by 2x2 max pooling, and two dense layers."""

    classes: int
    hidden: int = 128

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        x = images
        for features in (32, 64):
            x = nn.relu(nn.Conv(features, (3, 3))(x))
            x = nn.max_pool(x, (2, 2), strides=(2, 2))
        x = nn.relu(nn.Dense(self.hidden)(x.reshape(len(x), -1)))
        return nn.Dense(self.classes)(x)


class Block(nn.Module):
    """Two 3x3 convolutions and a skip connection around them (He et al. 2016)."""

    features: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        conv = partial(nn.Conv, use_bias=False)
        norm = partial(nn.BatchNorm, use_running_average=not train, momentum=0.9, epsilon=1e-5)
        strides = (self.stride, self.stride)
        y = nn.relu(norm()(conv(self.features, (3, 3), strides, padding=1)(x)))
        y = norm()(conv(self.features, (3, 3), padding=1)(y))
        if x.shape != y.shape:
            x = norm()(conv(self.features, (1, 1), strides)(x))
        return nn.relu(x + y)


class ResNet18(nn.Module):
    """ResNet-18 as used on CIFAR: a 3x3 stem without pooling, four stages of two blocks."""

    classes: int

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        x = nn.Conv(64, (3, 3), padding=1, use_bias=False)(images)
        x = nn.relu(nn.BatchNorm(not train, momentum=0.9, epsilon=1e-5)(x))
        for features, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
            x = Block(features, stride)(x, train)
            x = Block(features, 1)(x, train)
        return nn.Dense(self.classes)(jnp.mean(x, axis=(1, 2)))


def create(name: str, classes: int) -> nn.Module:
    """The model called `name`, one of `NAMES`."""
    models: dict[str, Callable[..., nn.Module]] = {"mlp": MLP, "cnn": CNN, "resnet18": ResNet18}
    return models[name](classes=classes)
