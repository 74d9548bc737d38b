"""Tables of the documentation, a module for each subject: records to Markdown."""
