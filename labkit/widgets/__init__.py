"""Pictures of what people hold: HTML with inline SVG, folded from events or read off core objects. No script, nothing
fetched, no torch; it never changes what it draws."""
