"""The report: one self-contained HTML file of tables, figures and examples, each traceable to its files."""
