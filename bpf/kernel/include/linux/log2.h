/* bcc brings its own, or needs none. */
