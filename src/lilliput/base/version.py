"""The one place where the version stands (read by the build)."""

__version__ = "0.1.0"
