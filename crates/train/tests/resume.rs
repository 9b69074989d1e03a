//! A run that is stopped and resumed is the run that was never stopped; damaged snapshots are passed over.

mod runs;

use cadre_train::log::StepRecord;
use cadre_train::trainer::{self, Outcome};
use runs::{Watch, recipe, snapshots, trajectory};

#[test]
fn stopped_and_resumed_equals_uninterrupted() {
    let folder = tempfile::tempdir().unwrap();
    let whole = recipe(folder.path(), "whole");
    let outcome = trainer::train(&whole, &mut Watch::default()).unwrap();
    assert!(matches!(outcome, Outcome::Finished { .. }));
    assert_eq!(snapshots(&whole).len(), 2, "keeps two");
    for name in ["config.json", "model.safetensors", "tokenizer.json"] {
        assert!(whole.output.dir.join("model").join(name).exists(), "{name}");
    }

    let parts = recipe(folder.path(), "parts");
    for stop_after in [Some(3), Some(2), None] {
        let mut watch = Watch {
            stop_after,
            ..Watch::default()
        };
        trainer::train(&parts, &mut watch).unwrap();
    }
    let log = std::fs::read_to_string(whole.output.dir.join("log.jsonl")).unwrap();
    let steps = log
        .lines()
        .filter_map(|line| serde_json::from_str::<StepRecord>(line).ok());
    let mut waited = 0.0;
    for step in steps {
        let parts = [step.data_seconds, step.idle_seconds];
        assert!(
            parts.iter().all(|part| (0.0..=step.seconds).contains(part)),
            "{step:?}"
        );
        waited += step.data_seconds;
    }
    assert!(waited > 0.0, "making batches takes time");
    let (whole, parts) = (trajectory(&whole), trajectory(&parts));
    assert_eq!(whole.len(), 8 + 2, "steps and evaluations");
    assert_eq!(whole, parts);
}

#[test]
fn a_damaged_snapshot_is_refused_and_the_one_before_it_is_used() {
    let folder = tempfile::tempdir().unwrap();
    let whole = recipe(folder.path(), "whole");
    trainer::train(&whole, &mut Watch::default()).unwrap();

    for damage in ["truncate", "flip", "no manifest"] {
        let hurt = recipe(folder.path(), damage);
        let mut watch = Watch {
            stop_after: Some(6),
            ..Watch::default()
        };
        trainer::train(&hurt, &mut watch).unwrap();
        let newest = snapshots(&hurt).pop().unwrap();
        let state = newest.join("state.safetensors");
        let mut bytes = std::fs::read(&state).unwrap();
        match damage {
            "truncate" => bytes.truncate(bytes.len() / 2),
            "flip" => *bytes.last_mut().unwrap() ^= 1,
            _ => std::fs::remove_file(newest.join("manifest.json")).unwrap(),
        }
        std::fs::write(&state, bytes).unwrap();

        let mut watch = Watch::default();
        trainer::train(&hurt, &mut watch).unwrap();
        assert_eq!(watch.started_at, 4, "{damage}");
        assert!(
            watch.refused[0].contains("step-00000006"),
            "{:?}",
            watch.refused
        );
        assert_eq!(trajectory(&hurt), trajectory(&whole), "{damage}");
    }
}
