"""Defines the command lines of the scripts."""
