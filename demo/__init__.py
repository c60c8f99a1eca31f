"""A tiny Z-Image-Turbo checkpoint that draws what it is told, and the code that trained and judged it."""
