"""From a source to a smaller source on the grid that ships."""
