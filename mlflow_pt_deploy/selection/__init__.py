"""Select a variant by limits and objective; plan cascades of two variants."""
