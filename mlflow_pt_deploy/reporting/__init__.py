"""Present results: tables, Markdown, plots and warnings."""
