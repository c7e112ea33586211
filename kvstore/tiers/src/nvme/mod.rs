//! L3: segment files and their index.
