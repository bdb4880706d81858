"""Which classes of a data set are for tuning, for choosing settings, and for reporting."""

from __future__ import annotations

_CIFAR_FS_TRAIN = """
dolphin seal aquarium_fish ray trout orchid sunflower tulip bottle bowl can cup plate apple mushroom
orange pear clock keyboard chair couch bee caterpillar cockroach bear lion tiger wolf bridge castle house
road skyscraper cloud forest mountain elephant kangaroo porcupine possum raccoon skunk lobster spider boy
girl dinosaur lizard snake turtle hamster mouse rabbit shrew squirrel oak_tree palm_tree pine_tree
willow_tree bus train lawn_mower streetcar tank
"""
_CIFAR_FS_VAL = """
beaver otter flatfish shark lamp television beetle butterfly sea camel cattle crab crocodile maple_tree
motorcycle tractor
"""
_CIFAR_FS_TEST = """
whale poppy rose sweet_pepper telephone bed table wardrobe leopard plain chimpanzee fox snail worm baby
man woman bicycle pickup_truck rocket
"""

CIFAR_FS: dict[str, tuple[str, ...]] = {
    "train": tuple(_CIFAR_FS_TRAIN.split()),
    "val": tuple(_CIFAR_FS_VAL.split()),
    "test": tuple(_CIFAR_FS_TEST.split()),
}
"""CIFAR-FS: the classes of CIFAR-100 in the 64 / 16 / 20 split of Bertinetto et al. (ICLR 2019)."""
