"""The organisms: small subjects trained on the Keeper's world, whose right answer is known; training, opening, measuring."""
