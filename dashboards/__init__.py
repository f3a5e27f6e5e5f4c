"""The local page that shows features, surgery and verdicts. (Nothing here yet.)"""
