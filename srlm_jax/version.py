"""The version of this code: what an artifact was made by is part of what it is made from. setup.py reads it, too."""

VERSION = "0.1.0"
