//! There and back again, and nonsense.

use super::*;
use proptest::prelude::*;

fn text() -> impl Strategy<Value = String> {
    "[a-z0-9_]{1,20}"
}

fn size() -> impl Strategy<Value = SizeRule> {
    prop_oneof![
        (1024u64..1 << 20).prop_map(SizeRule::Exact),
        (1024u64..1 << 20).prop_map(SizeRule::UpTo),
        (1u64..512, 1024u64..4096).prop_map(|(step, n)| SizeRule::MultipleOf { step, max: step * n }),
    ]
}

fn group(tokens_per_key: u32) -> impl Strategy<Value = Group> {
    let rule =
        prop_oneof![Just(Rule::All), (1u32..100_000).prop_map(|tokens| Rule::Window { tokens }), Just(Rule::State)];
    (rule, 1u32..8, 1u16..=1024, any::<bool>(), size()).prop_map(move |(rule, k, shards, replicated, size)| Group {
        rule,
        tokens_per_block: k * tokens_per_key,
        shards: if replicated { 1 } else { shards },
        replicated,
        size,
    })
}

prop_compose! {
    fn format()(
        tokens_per_key in 1u32..1024,
    )(
        tokens_per_key in Just(tokens_per_key),
        groups in proptest::collection::vec(group(tokens_per_key), 1..5),
        texts in (text(), text(), text(), text(), "[a-z]{0,5}"),
        canonical in any::<bool>(),
        sizes in (1u16.., 1u16.., 1u16..),
        (prefill_us_per_token, prefill_doubles_at_tokens) in any::<(u32, u32)>(),
    ) -> Format {
        let (tp, pp, cp) = if canonical { (1, 1, 1) } else { sizes };
        let (model, dtype, layout, hash_algorithm, hash_seed) = texts;
        Format {
            model, dtype, layout, hash_algorithm, hash_seed, tokens_per_key, groups, prefill_us_per_token, prefill_doubles_at_tokens,
            topology: Topology { canonical, tp, pp, cp },
        }
    }
}

proptest! {
    #[test]
    fn a_format_comes_back_as_it_went(format in format()) {
        let wire = format_to_proto(&format).encode_to_vec();
        let back = format_from_proto(Some(v1::Format::decode(&wire[..]).unwrap())).unwrap();
        prop_assert_eq!(back.fingerprint(), format.fingerprint());
        prop_assert_eq!(back, format);
    }

    #[test]
    fn a_context_comes_back_as_it_went(
        id in proptest::collection::vec(any::<u8>(), 0..=64),
        ms in 0u32..,
        kind in 0u8..6,
        tokens in any::<(u32, u32)>(),
        clock in any::<u64>(),
        session in any::<u64>(),
        hint in prop_oneof![0u32..3, any::<u32>()],
        priority in 0u8..4,
        label in text(),
    ) {
        let context = Context {
            request_id: RequestId::new(&id).unwrap(),
            deadline: millis_from_proto(ms),
            info: RequestInfo {
                kind: RequestKind::from_code(kind).unwrap(),
                input_tokens: tokens.0,
                output_tokens: tokens.1,
                session,
                client: 0,
                hint: match hint {
                    0 => None,
                    1 => Some(Hint::Ends),
                    ms => Some(Hint::DueIn(ms)),
                },
                priority: Priority::from_code(priority),
            },
            policy_clock: (clock != 0).then_some(Instant(clock)),
            label,
        };
        prop_assert_eq!(context_from_proto(Some(context_to_proto(&context))).unwrap(), context);
    }

    #[test]
    fn an_error_comes_back_as_it_went_through_a_status(
        kind in 0usize..KINDS.len(),
        after in proptest::option::of(1u32..100_000),
        value in ".*",
    ) {
        let mut error = Error::new(KINDS[kind], "a message").with("field", value);
        if let Some(ms) = after {
            error = error.retry_after(Duration::from_millis(u64::from(ms)));
        }
        let status = status_from_error(&error);
        prop_assert_eq!(detail_from_status(&status), Some(error_to_proto(&error)));
        let ours = crate::Error::from_status("verb", status);
        prop_assert_eq!(ours.kind(), crate::ErrorKind::Refused(error.kind()));
        prop_assert_eq!(ours.is_retryable(), error.is_retryable());
        prop_assert_eq!(ours.retry_after(), error.retry_hint());
        prop_assert!(!ours.may_have_run());
    }

    #[test]
    fn a_format_of_arbitrary_bytes_is_refused_or_valid(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        if let Ok(wire) = v1::Format::decode(&bytes[..])
            && let Ok(format) = format_from_proto(Some(wire))
        {
            format.validate().unwrap();
        }
    }

    #[test]
    fn a_bent_format_is_refused_or_valid(format in format(), at in any::<usize>(), bit in 0u8..8) {
        let mut wire = format_to_proto(&format).encode_to_vec();
        let at = at % wire.len();
        wire[at] ^= 1 << bit;
        if let Ok(wire) = v1::Format::decode(&wire[..])
            && let Ok(format) = format_from_proto(Some(wire))
        {
            format.validate().unwrap();
        }
    }

    #[test]
    fn an_error_trailer_of_arbitrary_bytes_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..100)) {
        let mut status = tonic::Status::internal("x");
        status.metadata_mut().insert_bin(ERROR_DETAIL_KEY, MetadataValue::from_bytes(&bytes));
        let _ = crate::Error::from_status("verb", status);
    }

    #[test]
    fn a_number_that_is_no_word_is_refused(n in prop_oneof![-5i32..0, 100..1000]) {
        prop_assert!(tier_from_proto(n).is_err() && class_from_proto(n).is_err() && status_from_proto(n).is_err());
        prop_assert!(fidelity_from_proto(n).is_err() && reason_from_proto(n).is_err() && retention_from_proto(n).is_err());
    }

    #[test]
    fn a_wait_is_never_sent_as_none(ns in 1u64..10_000_000_000) {
        let ms = millis_to_proto(Duration::from_nanos(ns));
        prop_assert!(ms > 0 && u64::from(ms - 1) * 1_000_000 < ns);
    }
}

/// Core numbers its words as the wire does: by the wire's own names.
#[test]
fn every_word_is_the_wire_s_word() {
    fn same(prefix: &str, word: &str, name: &str) {
        assert_eq!(format!("{prefix}_{}", word.to_uppercase()), name);
    }
    for w in Tier::ALL {
        same("TIER", w.word(), v1::Tier::try_from(tier_to_proto(*w)).unwrap().as_str_name());
        assert_eq!(tier_from_proto(tier_to_proto(*w)).unwrap(), *w);
    }
    for w in Class::ALL {
        same("CLASS", w.word(), v1::Class::try_from(class_to_proto(*w)).unwrap().as_str_name());
    }
    for w in Fidelity::ALL {
        same("FIDELITY", w.word(), v1::Fidelity::try_from(fidelity_to_proto(*w)).unwrap().as_str_name());
    }
    for w in PartStatus::ALL {
        same("PART_STATUS", w.word(), v1::PartStatus::try_from(status_to_proto(*w)).unwrap().as_str_name());
    }
    for w in MissReason::ALL {
        same("MISS_REASON", w.word(), v1::MissReason::try_from(reason_to_proto(*w)).unwrap().as_str_name());
    }
    for w in RequestKind::ALL {
        same("REQUEST_KIND", w.word(), v1::RequestKind::try_from(kind_to_proto(*w)).unwrap().as_str_name());
    }
}

#[test]
fn what_is_said_of_sessions_comes_back_as_it_went() {
    for state in [SessionState::Open, SessionState::Closed] {
        assert_eq!(session_state_opt_from_proto(session_state_to_proto(state)).unwrap(), Some(state));
    }
    assert_eq!(session_state_opt_from_proto(0).unwrap(), None);
    assert!(session_state_opt_from_proto(3).is_err());
    for hint in [
        SessionHint::Finished,
        SessionHint::Paused,
        SessionHint::DueIn(Duration::from_secs(100 * 86_400)),
        SessionHint::Priority(-3),
    ] {
        assert_eq!(session_hint_from_proto(&session_hint_to_proto(hint)), Some(hint));
    }
}

#[test]
fn what_is_unset_reads_as_the_proto_says() {
    assert_eq!(class_from_proto(0).unwrap(), Class::Cache);
    assert_eq!(fidelity_from_proto(0).unwrap(), Fidelity::Exact);
    assert_eq!(retention_from_proto(0).unwrap(), Retention::BestEffort);
    assert!(handle_from_proto(None).is_err());
    assert!(handle_from_proto(Some(v1::Handle::default())).is_err());
    assert_eq!(context_from_proto(None).unwrap(), Context::default());
}

#[test]
fn hello_required_is_told_from_every_other_failure() {
    let error = crate::Error::from_status("match", status_from_detail(&hello_required()));
    assert_eq!(error.kind(), crate::ErrorKind::HelloRequired);
    assert!(error.is_retryable());
}
