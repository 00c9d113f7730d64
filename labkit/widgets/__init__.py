"""HTML views with inline SVG, made from events or core objects. No script, no torch, nothing is fetched. A view never
changes what it shows."""
