"""Each way that there is today to get hidden states to disk, as its best user would write it; one file each."""
