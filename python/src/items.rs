//! What a get or a put names: keys and their parts, and where each lies.

use kvkeep_client::{GetItem, Place, Put, PutPart, PutPosition, Retention};
use pyo3::prelude::*;

use crate::args::{self, Parts, opt_seconds};
use crate::error::wrong_with;
use crate::place::places;

/// The items of a get, and where they go.
pub(crate) fn gets(
    said: &Bound<'_, PyAny>,
    key_len: Option<usize>,
    parts: Option<&Bound<'_, PyAny>>,
    to: &Bound<'_, PyAny>,
    blocks: Option<&Bound<'_, PyAny>>,
) -> PyResult<(Vec<GetItem>, Vec<Place>)> {
    let keys = args::keys(said, key_len)?;
    let parts = Parts::of(parts, keys.len())?;
    let places = places(to, blocks, parts.items(keys.len()), true)?;
    let of_key = |(n, key): (usize, bytes::Bytes)| {
        parts.at(n).iter().map(move |(g, s)| GetItem::part(key.clone(), *g, *s)).collect::<Vec<_>>()
    };
    Ok((keys.into_iter().enumerate().flat_map(of_key).collect(), places))
}

/// How positions are put: what a put says beside them.
pub(crate) struct How<'a, 'py> {
    pub(crate) parent: Option<&'a Bound<'py, PyAny>>,
    pub(crate) first_position: u32,
    pub(crate) cls: Option<&'a str>,
    pub(crate) keep: bool,
    pub(crate) unordered: bool,
    pub(crate) ttl: Option<f64>,
    pub(crate) priority: i32,
    pub(crate) token_ids: Option<Vec<Vec<u32>>>,
}

/// The positions of a put.
pub(crate) fn puts(
    said: &Bound<'_, PyAny>,
    key_len: Option<usize>,
    parts: Option<&Bound<'_, PyAny>>,
    from: &Bound<'_, PyAny>,
    blocks: Option<&Bound<'_, PyAny>>,
    how: How<'_, '_>,
) -> PyResult<Put<Place>> {
    let keys = args::keys(said, key_len)?;
    let parts = Parts::of(parts, keys.len())?;
    let mut places = places(from, blocks, parts.items(keys.len()), false)?.into_iter();
    let mut token_ids = how.token_ids.unwrap_or_default();
    if !token_ids.is_empty() && token_ids.len() != keys.len() {
        return Err(wrong_with("there is one list of token ids per key", "lists", token_ids.len()));
    }
    token_ids.resize_with(keys.len(), Vec::new);
    let position = |(n, (key, token_ids)): (usize, (bytes::Bytes, Vec<u32>))| {
        // As many places as items were counted above.
        let data = parts.at(n).iter().zip(&mut places);
        let parts = data.map(|((group, shard), data)| PutPart { group: *group, shard: *shard, data }).collect();
        PutPosition { key, parts, token_ids }
    };
    Ok(Put {
        parent: how.parent.map(args::copied).transpose()?,
        first_position: how.first_position,
        positions: keys.into_iter().zip(token_ids).enumerate().map(position).collect(),
        class: args::class(how.cls)?,
        retention: if how.keep { Retention::Keep } else { Retention::BestEffort },
        unordered: how.unordered,
        ttl: opt_seconds(how.ttl)?,
        priority: how.priority,
    })
}
