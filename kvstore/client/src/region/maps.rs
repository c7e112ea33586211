//! Which of this process's memory is a mapping of which file, as the kernel tells in `/proc/self/maps`.
//!
//! ```text
//! 7f1c2a000000-7f1c2b000000 rw-s 00100000 00:1a 4711      /dev/shm/name
//! from         to           ^ shared at     device inode
//! ```

use std::io;

/// A file: device and inode, as `/proc` writes them. No other file has them while one of its descriptors is open.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileId {
    device: String,
    inode: u64,
}

impl FileId {
    /// Of the file.
    pub fn inode(&self) -> u64 {
        self.inode
    }
}

#[derive(Debug, PartialEq, Eq)]
struct Mapping {
    start: usize,
    end: usize,
    /// `None`: private, or of no file.
    file: Option<(FileId, u64)>,
}

/// The mappings of this process at one moment, by address.
#[derive(Debug)]
pub struct Maps(Vec<Mapping>);

impl Maps {
    /// As they are now. A millisecond in a process with thousands of them.
    ///
    /// # Errors
    /// Where `/proc` cannot be read.
    pub fn read() -> io::Result<Self> {
        Ok(Self::parse(&String::from_utf8_lossy(&std::fs::read("/proc/self/maps")?)))
    }

    fn parse(text: &str) -> Self {
        Self(text.lines().filter_map(Mapping::parse).collect())
    }

    /// The file of which all of this memory is one shared mapping without a gap, and where in it the memory begins.
    pub fn file_at(&self, address: usize, bytes: usize) -> Option<(FileId, u64)> {
        let end = address.checked_add(bytes)?;
        let mut at = self.0.iter().skip_while(|m| m.end <= address);
        let first = at.next().filter(|m| m.start <= address)?;
        let (file, offset) = first.file.as_ref()?;
        let mut reached = first.end;
        while reached < end {
            let next = at.next().filter(|m| m.start == reached)?;
            let (of, at) = next.file.as_ref()?;
            // The kernel keeps mappings apart that differ in their rights, or that it did not join.
            if of != file || *at != offset + (next.start - first.start) as u64 {
                return None;
            }
            reached = next.end;
        }
        Some((file.clone(), offset + (address - first.start) as u64))
    }
}

impl Mapping {
    fn parse(line: &str) -> Option<Self> {
        let mut fields = line.split_ascii_whitespace();
        let (start, end) = fields.next()?.split_once('-')?;
        let (rights, offset, device, inode) = (fields.next()?, fields.next()?, fields.next()?, fields.next()?);
        let inode: u64 = inode.parse().ok()?;
        let file = FileId { device: device.to_owned(), inode };
        let offset = u64::from_str_radix(offset, 16).ok()?;
        Some(Self {
            start: usize::from_str_radix(start, 16).ok()?,
            end: usize::from_str_radix(end, 16).ok()?,
            file: (rights.ends_with('s') && inode != 0).then_some((file, offset)),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "\
1000-3000 rw-s 00005000 00:1a 7        /dev/shm/a b (deleted)
3000-4000 r--s 00007000 00:1a 7        /dev/shm/a b (deleted)
4000-5000 rw-s 00008000 00:1a 8        /dev/shm/other
5000-6000 rw-s 00009000 00:1a 8        /dev/shm/other
6000-7000 rw-s 00009000 00:1a 8        /dev/shm/other
8000-9000 rw-p 00000000 00:1a 7        /dev/shm/a b
9000-a000 rw-p 00000000 00:00 0 
a000-b000 rw-s 00000000 00:01 9        /dev/zero
";

    fn at(address: usize, bytes: usize) -> Option<(u64, u64)> {
        Maps::parse(TEXT).file_at(address, bytes).map(|(file, offset)| (file.inode(), offset))
    }

    #[test]
    fn memory_is_of_a_file_where_all_of_it_is_one_shared_mapping() {
        assert_eq!(at(0x1000, 0x2000), Some((7, 0x5000)));
        assert_eq!(at(0x2800, 0x1800), Some((7, 0x6800)), "two mappings that follow each other in the file, too");
        assert_eq!(at(0x4000, 0x2000), Some((8, 0x8000)));
        assert_eq!(at(0x3000, 0x1001), None, "into another file");
        assert_eq!(at(0x5000, 0x1001), None, "into the same pages of the file once more");
        assert_eq!(at(0x6000, 0x1001), None, "into nothing");
        assert_eq!((at(0x7000, 1), at(0x8000, 1), at(0x9000, 1)), (None, None, None), "nothing, private, anonymous");
        assert_eq!((at(0xf000, 1), at(usize::MAX, 2)), (None, None));
    }

    #[test]
    fn what_is_no_line_of_maps_is_no_mapping() {
        for line in ["", "x", "1000-2000", "1000 2000 rw-s 0 0 0", "1000-zz rw-s 0 00:1a 7", "1000-2000 rw-s 0 00:1a x"]
        {
            assert_eq!(Mapping::parse(line), None, "{line}");
        }
        assert!(!Maps::read().unwrap().0.is_empty());
    }
}
