//! `/v1/embeddings`, against the engine.

use cadre_engine::{Logits, NoObserver, Sequence};
use serde_json::{Value, json};

use crate::client::post;
use crate::setup::Setup;

const PATH: &str = "/v1/embeddings";

/// The mean of the vectors of a text's tokens, or of the last `n` of them, of length 1.
fn expected(setup: &Setup, text: &str, n: usize) -> Vec<f64> {
    let ids = setup.tokenizer.encode(text).unwrap();
    let mut session = setup.model.session(&setup.session).unwrap();
    let mut workspace = setup.model.workspace(ids.len()).unwrap();
    let mut batch = [Sequence {
        session: &mut session,
        tokens: &ids,
        want: Logits::All,
    }];
    setup
        .model
        .forward_batch(&mut batch, &mut workspace, &mut NoObserver)
        .unwrap();
    let d_model = setup.model.info().d_model;
    assert_eq!(workspace.hidden().len(), ids.len() * d_model);
    let mut sum = vec![0.0; d_model];
    let rows = workspace.hidden().chunks_exact(d_model);
    for row in rows.rev().take(n) {
        sum.iter_mut()
            .zip(row)
            .for_each(|(sum, x)| *sum += f64::from(*x));
    }
    let length = sum.iter().map(|x: &f64| x * x).sum::<f64>().sqrt();
    sum.iter().map(|x| x / length).collect()
}

fn vector(value: &Value) -> Vec<f64> {
    value
        .as_array()
        .unwrap()
        .iter()
        .map(|x| x.as_f64().unwrap())
        .collect()
}

#[test]
fn vectors_are_means_of_what_the_last_layer_gives() {
    let setup = Setup::new();
    let long = "the miller and the cat went home to the mill and ".repeat(12);
    let texts = ["the cat", &long, "x"];
    let answer = post(
        setup.address(),
        PATH,
        &json!({"model": "tiny", "input": texts, "user": "me"}),
    )
    .json();
    assert_eq!(answer["object"], "list");
    let mut n_tokens = 0;
    for (i, text) in texts.iter().enumerate() {
        let data = &answer["data"][i];
        assert_eq!(
            (&data["index"], &data["object"]),
            (&json!(i), &json!("embedding"))
        );
        for (got, want) in vector(&data["embedding"])
            .iter()
            .zip(expected(&setup, text, usize::MAX))
        {
            assert!((got - want).abs() < 1e-6, "{got} {want}");
        }
        let last = json!({"input": text, "pooling": "last"});
        let last = post(setup.address(), PATH, &last).json();
        for (got, want) in vector(&last["data"][0]["embedding"])
            .iter()
            .zip(expected(&setup, text, 1))
        {
            assert!((got - want).abs() < 1e-6, "last: {got} {want}");
        }
        n_tokens += setup.tokenizer.encode(text).unwrap().len();
    }
    assert_eq!(answer["usage"]["prompt_tokens"], n_tokens);
    let ids = setup.tokenizer.encode("the cat").unwrap();
    let coded = json!({"input": [ids], "encoding_format": "base64"});
    let coded = post(setup.address(), PATH, &coded).json();
    let text = coded["data"][0]["embedding"].as_str().unwrap();
    // Four bytes a number, four letters for three bytes.
    assert_eq!(text.len(), (4 * setup.model.info().d_model).div_ceil(3) * 4);
    for (body, param) in [
        (json!({"input": []}), "input"),
        (json!({"input": ""}), "input"),
        (json!({"input": "x", "dimensions": 8}), "dimensions"),
        (
            json!({"input": "x", "encoding_format": "int8"}),
            "encoding_format",
        ),
        (json!({"input": "x", "pooling": "max"}), "pooling"),
        (json!({"input": "x", "temperature": 1}), "temperature"),
    ] {
        assert_eq!(
            post(setup.address(), PATH, &body).error(),
            (400, json!(param)),
            "{body}"
        );
    }
    setup.end();
}
