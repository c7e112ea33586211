//! Write: the middle step of a put. Chunks of one reservation come in order; chunks of several may be mixed.

use std::collections::HashMap;
use std::sync::Arc;

use kvkeep_core::{Error, ErrorKind, Result};

use super::Store;
use super::put::Caller;
use super::reservations::{Reservation, ReservationId};

/// Reservations one Write call may have open.
const OPEN_RESERVATIONS_MAX: usize = 8192;

/// One Write call: holds the slots it is filling and gives them back when it ends, however it ends.
pub struct Writer {
    store: Arc<Store>,
    caller: Caller,
    open: HashMap<ReservationId, Box<Reservation>>,
    /// In order of first touch.
    touched: Vec<(ReservationId, Option<Error>, u32)>,
    index: HashMap<ReservationId, usize>,
}

impl Store {
    /// Starts a Write call.
    pub fn writer(self: &Arc<Self>, caller: Caller) -> Writer {
        Writer { store: Arc::clone(self), caller, open: HashMap::new(), touched: Vec::new(), index: HashMap::new() }
    }
}

impl Writer {
    /// Lands one chunk. A chunk that does not continue its reservation ends that reservation; the others go on.
    ///
    /// # Errors
    /// `TooLarge` where the call touches more reservations than one call may.
    pub fn chunk(&mut self, id: ReservationId, offset: u64, data: &[u8]) -> Result<()> {
        let at = match self.index.get(&id) {
            Some(at) => *at,
            None if self.touched.len() == OPEN_RESERVATIONS_MAX => {
                return Err(Error::new(ErrorKind::TooLarge, "one write call touches at most 8192 reservations"));
            }
            None => {
                let error = match self.store.reservations.lock().take(id, self.caller.tenant) {
                    Ok(reservation) => {
                        self.open.insert(id, reservation);
                        None
                    }
                    Err(e) => Some(e),
                };
                let at = self.touched.len();
                self.index.insert(id, at);
                self.touched.push((id, error, 0));
                at
            }
        };
        let Some(reservation) = self.open.get_mut(&id) else { return Ok(()) };
        match land(reservation, offset, data) {
            Ok(()) => self.touched[at].2 = reservation.written,
            Err(e) => {
                self.touched[at].1 = Some(e);
                self.open.remove(&id);
                self.store.reservations.lock().finish(id);
                self.store.counters.reservations_abandoned.one();
            }
        }
        Ok(())
    }

    /// Ends the call: per reservation touched, the bytes landed so far or why it was abandoned.
    pub fn finish(mut self) -> Vec<(ReservationId, Option<Error>, u32)> {
        std::mem::take(&mut self.touched)
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        let mut reservations = self.store.reservations.lock();
        for (id, reservation) in self.open.drain() {
            reservations.give_back(id, reservation);
        }
    }
}

fn land(reservation: &mut Reservation, offset: u64, data: &[u8]) -> Result<()> {
    let (written, len) = (reservation.written, reservation.meta.len);
    if offset != u64::from(written) {
        return Err(Error::new(ErrorKind::InvalidArgument, "a chunk must start where the last one ended")
            .with("offset", offset)
            .with("written", written));
    }
    let end = offset + data.len() as u64;
    if end > u64::from(len) {
        return Err(Error::new(ErrorKind::WrongSize, "more bytes than were reserved")
            .with("end", end)
            .with("bytes", len));
    }
    let Some(slot) = reservation.slot.as_mut() else {
        return Err(Error::new(ErrorKind::InvalidArgument, "an upgrade brings no bytes: commit it"));
    };
    slot.write_at(written as usize, data)?;
    reservation.written = end as u32;
    Ok(())
}
