"""The stages: one artifact in, one artifact out. A stage never imports a stage."""
