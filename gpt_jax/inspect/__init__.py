"""What happens inside a model: attention, lens, heads, patching, attribution. Numbers first; page.py draws them."""
