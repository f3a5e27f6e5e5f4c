"""Word forms and the probability that a model says them. (Nothing here yet.)"""
