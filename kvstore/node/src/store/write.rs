//! Write: the middle step of a put. Chunks of one reservation come in order; chunks of several may be mixed.

use std::collections::HashMap;
use std::sync::Arc;

use kvkeep_client::convert;
use kvkeep_core::checksum::RunningSums;
use kvkeep_core::{Error, ErrorKind, Result};
use kvkeep_proto::v1;

use kvkeep_tiers::copy::copy_cold;

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
    /// Bytes are on their way into this one: if the call ends now, nobody knows what it holds.
    landing: Option<ReservationId>,
    /// In order of first touch.
    touched: Vec<(ReservationId, Option<Error>, u32)>,
    index: HashMap<ReservationId, usize>,
}

/// Where bytes of a reservation land.
pub struct Room<'a> {
    /// Memory of its slot.
    pub bytes: &'a mut [u8],
    /// The sums of what landed before.
    pub sums: &'a mut RunningSums,
}

impl Store {
    /// Starts a Write call.
    pub fn writer(self: &Arc<Self>, caller: Caller) -> Writer {
        Writer {
            store: Arc::clone(self),
            caller,
            open: HashMap::new(),
            landing: None,
            touched: Vec::new(),
            index: HashMap::new(),
        }
    }
}

impl Writer {
    /// Lands one chunk. A chunk that does not continue its reservation ends that reservation; the others go on.
    ///
    /// # Errors
    /// `TooLarge` where the call touches more reservations than one call may.
    pub fn chunk(&mut self, id: ReservationId, offset: u64, data: &[u8]) -> Result<()> {
        if let Some(Room { bytes, sums }) = self.room(id, offset, data.len())? {
            copy_cold(bytes, data);
            sums.add(data);
            self.landed(id, data.len());
        }
        Ok(())
    }

    /// Where the next `len` bytes of a reservation go, all of which are then added to its sums, and told of by
    /// [`Self::landed`]: a call that ends in between ends the reservation. `None`: nowhere, for the reservation has ended,
    /// perhaps just now for a chunk that does not continue it.
    ///
    /// # Errors
    /// As [`Self::chunk`].
    pub fn room(&mut self, id: ReservationId, offset: u64, len: usize) -> Result<Option<Room<'_>>> {
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
        if let Some(Err(e)) = self.open.get_mut(&id).map(|r| check(r, offset, len)) {
            self.touched[at].1 = Some(e);
            self.open.remove(&id);
            self.store.reservations.lock().finish(id);
            self.store.counters.reservations_abandoned.one();
        }
        let Some(reservation) = self.open.get_mut(&id) else { return Ok(None) };
        let Reservation { slot, sums, written, .. } = &mut **reservation;
        let start = *written as usize;
        let slot = slot.as_mut().map(|slot| slot.bytes_mut()).transpose()?;
        let Some(bytes) = slot.and_then(|bytes| bytes.get_mut(start..start + len)) else { return Ok(None) };
        self.landing = Some(id);
        Ok(Some(Room { bytes, sums }))
    }

    /// So many bytes are where [`Self::room`] said, and in its sums.
    pub fn landed(&mut self, id: ReservationId, len: usize) {
        self.landing = None;
        let Some(reservation) = self.open.get_mut(&id) else { return };
        reservation.written += len as u32;
        if let Some(at) = self.index.get(&id) {
            self.touched[*at].2 = reservation.written;
        }
    }

    /// Ends the call: per reservation touched, the bytes landed so far or why it was abandoned.
    pub fn finish(mut self) -> v1::WriteReply {
        let touched = std::mem::take(&mut self.touched).into_iter();
        let results = touched.map(|(id, error, written)| v1::WriteResult {
            reservation_id: id.0,
            bytes: u64::from(written),
            error: error.as_ref().map(convert::error_to_proto),
        });
        v1::WriteReply { results: results.collect() }
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        let mut reservations = self.store.reservations.lock();
        for (id, reservation) in self.open.drain() {
            if self.landing == Some(id) {
                reservations.finish(id);
                self.store.counters.reservations_abandoned.one();
            } else {
                reservations.give_back(id, reservation);
            }
        }
    }
}

/// Whether a chunk continues its reservation.
fn check(reservation: &Reservation, offset: u64, bytes: usize) -> Result<()> {
    let (written, len) = (reservation.written, reservation.meta.len);
    if offset != u64::from(written) {
        return Err(Error::new(ErrorKind::InvalidArgument, "a chunk must start where the last one ended")
            .with("offset", offset)
            .with("written", written));
    }
    let end = offset.saturating_add(bytes as u64);
    if end > u64::from(len) {
        return Err(Error::new(ErrorKind::WrongSize, "more bytes than were reserved")
            .with("end", end)
            .with("bytes", len));
    }
    if reservation.slot.is_none() {
        return Err(Error::new(ErrorKind::InvalidArgument, "an upgrade brings no bytes: commit it"));
    }
    Ok(())
}

impl Store {
    /// Fills a reservation's slot by one copy of all its bytes, which `copy` sums. Whatever `copy` answers is given back; on its
    /// error the reservation is as it was.
    ///
    /// # Errors
    /// Of `copy`; `Expired` and `Conflict` where the reservation is not there to be written.
    pub fn fill<T>(
        &self,
        caller: Caller,
        id: ReservationId,
        copy: impl FnOnce(&mut [u8], &mut RunningSums) -> Result<T>,
    ) -> Result<T> {
        let mut reservation = self.reservations.lock().take(id, caller.tenant)?;
        let filled = (|| {
            let slot = reservation.slot.as_mut().filter(|_| reservation.written == 0);
            let slot = slot.ok_or_else(|| Error::new(ErrorKind::Conflict, "the reservation takes no bytes"))?;
            let mut sums = RunningSums::default();
            let copied = copy(slot.bytes_mut()?, &mut sums)?;
            reservation.sums = sums;
            reservation.written = reservation.meta.len;
            Ok(copied)
        })();
        self.reservations.lock().give_back(id, reservation);
        filled
    }
}
