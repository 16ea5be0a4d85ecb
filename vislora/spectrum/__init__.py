"""The papers' analyses of what training did to weights: sources, measures, a table that resumes, and plots."""
