"""L5: one file a verb; the verbs parse words, call the Python API and show what came back."""
