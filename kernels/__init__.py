"""What runs per layer, per device. Imports nothing else of this project.

Kept free of imports: other packages probe for a top-level module of this name.
"""

__version__ = "0"
