"""The only package that touches Transformers' internals: sites, seams, caches and the surgery
that attaches them.
"""
