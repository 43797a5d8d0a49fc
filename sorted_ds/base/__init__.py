"""Holds errors, files and keyed shuffles, on which all other folders build."""
