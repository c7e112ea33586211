//! [`Transfer`]: how far a read or write has come, and what to do with the kernel's answer. Kept apart from the engines
//! so that all of them treat short counts, EINTR and EAGAIN alike, and so that it can be tested without a kernel.

use std::io;

use super::buf::IO_ALIGN;

/// Answers in a row that moved nothing (EINTR, EAGAIN) after which an operation gives up with the last of them.
pub(crate) const MAX_IDLE_ANSWERS: u32 = 256;

/// Which way the bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Direction {
    /// From the device into the buffer.
    Read,
    /// From the buffer to the device.
    Write,
}

/// What to do next.
#[derive(Debug)]
pub(crate) enum Step {
    /// Ask the kernel again for the bytes from [`Transfer::resume_at`] on.
    Again,
    /// The operation has ended: bytes moved, or why it failed.
    Done(io::Result<usize>),
}

/// The state of one operation over `len` bytes.
#[derive(Debug)]
pub(crate) struct Transfer {
    direction: Direction,
    len: usize,
    done: usize,
    idle: u32,
}

impl Transfer {
    pub(crate) fn new(direction: Direction, len: usize) -> Self {
        Self { direction, len, done: 0, idle: 0 }
    }

    pub(crate) fn direction(&self) -> Direction {
        self.direction
    }

    /// Where the next request starts, bytes from the start of the operation: what has been moved, rounded down to a
    /// page, because O_DIRECT takes whole pages. The part of a page that is moved twice is the same both times.
    pub(crate) fn resume_at(&self) -> usize {
        self.done - self.done % IO_ALIGN
    }

    /// Takes the kernel's answer to a request for the bytes `resume_at()..len`.
    pub(crate) fn answer(&mut self, answer: io::Result<usize>) -> Step {
        match answer {
            Ok(bytes) => {
                let reached = self.resume_at() + bytes;
                if reached >= self.len {
                    return Step::Done(Ok(self.len));
                }
                if reached > self.done {
                    self.done = reached;
                    self.idle = 0;
                    return Step::Again;
                }
                // Nothing new: a read has met the end of the file, a write a device that takes no more.
                Step::Done(match self.direction {
                    Direction::Read => Ok(self.done),
                    Direction::Write => Err(io::Error::new(
                        io::ErrorKind::WriteZero,
                        format!("device took {} of {} bytes", self.done, self.len),
                    )),
                })
            }
            Err(e) if matches!(e.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock) => {
                self.idle += 1;
                if self.idle < MAX_IDLE_ANSWERS { Step::Again } else { Step::Done(Err(e)) }
            }
            Err(e) => Step::Done(Err(e)),
        }
    }

    /// Drives a blocking `request(resume_at)` to the end.
    pub(crate) fn run(mut self, mut request: impl FnMut(usize) -> io::Result<usize>) -> io::Result<usize> {
        loop {
            if let Step::Done(result) = self.answer(request(self.resume_at())) {
                return result;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const P: usize = IO_ALIGN;

    fn run(direction: Direction, len: usize, answers: &[Result<usize, i32>]) -> (io::Result<usize>, Vec<usize>) {
        let (mut answers, mut asked) = (answers.iter(), Vec::new());
        let result = Transfer::new(direction, len).run(|at| {
            asked.push(at);
            answers.next().expect("asked more often than the script says").map_err(io::Error::from_raw_os_error)
        });
        (result, asked)
    }

    #[test]
    fn a_short_read_goes_on_at_the_page_it_reached() {
        let (result, asked) = run(Direction::Read, 4 * P, &[Ok(P + 512), Ok(P), Ok(2 * P)]);
        assert_eq!((result.unwrap(), asked), (4 * P, vec![0, P, 2 * P]));
    }

    #[test]
    fn an_interrupted_request_is_asked_again() {
        let (result, asked) =
            run(Direction::Write, 2 * P, &[Err(libc::EINTR), Ok(P), Err(libc::EAGAIN), Err(libc::EINTR), Ok(P)]);
        assert_eq!((result.unwrap(), asked), (2 * P, vec![0, 0, P, P, P]));
    }

    #[test]
    fn a_read_ends_with_the_file() {
        assert_eq!(run(Direction::Read, 2 * P, &[Ok(0)]).0.unwrap(), 0);
        assert_eq!(run(Direction::Read, 2 * P, &[Ok(P), Ok(0)]).0.unwrap(), P);
        assert_eq!(
            run(Direction::Read, 2 * P, &[Ok(P + 100), Ok(100)]).0.unwrap(),
            P + 100,
            "a file that ends in a page"
        );
    }

    #[test]
    fn a_write_that_stops_is_an_error() {
        let error = run(Direction::Write, 2 * P, &[Ok(P), Ok(0)]).0.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::WriteZero);
        assert_eq!(run(Direction::Write, P, &[Err(libc::ENOSPC)]).0.unwrap_err().raw_os_error(), Some(libc::ENOSPC));
    }

    #[test]
    fn an_endless_interruption_ends() {
        let mut asked = 0;
        let result = Transfer::new(Direction::Read, P).run(|_| {
            asked += 1;
            Err(io::Error::from_raw_os_error(libc::EINTR))
        });
        assert_eq!((result.unwrap_err().raw_os_error(), asked), (Some(libc::EINTR), MAX_IDLE_ANSWERS));
    }
}
