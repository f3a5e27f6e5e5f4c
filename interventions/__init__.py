"""Operators, recipes and audits: edits of a forward pass at the feature level. (Nothing here yet.)"""
