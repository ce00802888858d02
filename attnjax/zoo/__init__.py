"""Trained models, verified when they are loaded.

    zoo.list("gla-*")                                the cards, sorted by name
    module, params, card = zoo.load("gla-tiny.mqar@1")
    zoo.save(name, params, card, root=folder)        immutable: a retrain is the next version

Extra folders of checkpoints: the environment variable ATTNJAX_ZOO, or `root=`.
"""

from attnjax.zoo import card, digest, store

Card = card.Card
CheckpointCorrupted = digest.CheckpointCorrupted
SHIPPED = store.SHIPPED
summary = card.summary
list = store.list_cards
load = store.load
save = store.save
