"""What training any network needs. Knows no files and no command line."""
