"""The Uni-Food builder: from sources that a user brings to a labelled, checked and sharded data set.

Stages run one after another, each in a folder of its own below the build's; see `rode_food.unifood.build`.
"""
