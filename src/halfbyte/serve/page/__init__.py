"""The page: what a person looks at. Static files of this folder, held in memory."""
