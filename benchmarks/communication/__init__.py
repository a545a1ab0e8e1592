"""Volumes of communication in a step of training: counted, and by formula."""
