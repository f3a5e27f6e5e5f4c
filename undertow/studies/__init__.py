"""Scripted studies: arms, controls, measures, statistics. (Nothing here yet.)"""
