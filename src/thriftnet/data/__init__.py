"""Images and labels. The bundled digits need no download."""
