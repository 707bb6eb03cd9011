//! Models that come and go while others serve: by name, within a budget, and with their memory given back.

use lacuna::service::proto::models_client::ModelsClient;
use lacuna::service::proto::{
    GenerateRequest, ListModelsRequest, ListModelsResponse, LoadModelRequest, ModelState, UnloadModelRequest,
};
use tonic::Code;
use tonic::transport::Channel;
use tonic_types::StatusExt;

use crate::certificates::path;
use crate::server::{Server, begin, exchange, finish, lacuna, request, stderr};

async fn list(models: &mut ModelsClient<Channel>) -> ListModelsResponse {
    models.list(ListModelsRequest {}).await.expect("a list").into_inner()
}

fn load(name: &str) -> LoadModelRequest {
    LoadModelRequest { name: name.into() }
}

fn unload(name: &str) -> UnloadModelRequest {
    UnloadModelRequest { name: name.into() }
}

fn of(model: &str, cells: u64) -> GenerateRequest {
    GenerateRequest { model: model.into(), ..request(cells) }
}

/// Whoever asks is told how weights are held, and what they take.
#[tokio::test(flavor = "multi_thread")]
async fn quantised_weights_are_told() {
    let (plain, narrow) = (Server::start(&["--threads", "1"]), Server::start(&["--threads", "1", "--quantize", "int8"]));
    let (plain, channel) = (plain.channel().await, narrow.channel().await);
    let (plain, narrow) = (list(&mut ModelsClient::new(plain)).await, list(&mut ModelsClient::new(channel.clone())).await);
    let (plain, told) = (&plain.models[0], &narrow.models[0]);
    assert_eq!((plain.quantization.as_str(), told.quantization.as_str(), told.dtype.as_str()), ("", "int8", "f32"));
    assert!(told.weight_bytes < plain.weight_bytes / 3, "{} and {}", told.weight_bytes, plain.weight_bytes);
    assert_eq!(finish(begin(channel, of("nano", 8)).await.expect("it begins")).await.expect("and ends"), 8);
}

#[tokio::test(flavor = "multi_thread")]
async fn models_come_and_go_under_traffic() {
    let mut server = Server::start(&["--model-folder", "models", "--threads", "1"]);
    let channel = server.channel().await;
    let mut models = ModelsClient::new(channel.clone());
    let before = list(&mut models).await;
    assert_eq!(before.loadable, ["nano-ar", "nano-block"]);
    assert_eq!(before.models[0].state(), ModelState::Ready);
    let memory = before.memory.expect("a budget");
    assert!(memory.taken_bytes > 0 && memory.taken_bytes < memory.budget_bytes, "{memory:?}");
    let unknown = begin(channel.clone(), of("nano-block", 4)).await.expect_err("it is not loaded");
    assert_eq!(unknown.code(), Code::NotFound);
    // Somebody else's traffic all the while.
    let (stop, stopped) = tokio::sync::watch::channel(false);
    let traffic = tokio::spawn({
        let channel = channel.clone();
        async move {
            let mut done = 0;
            while !*stopped.borrow() {
                assert_eq!(finish(begin(channel.clone(), of("nano", 8)).await?).await?, 8);
                done += 1;
            }
            Ok::<_, tonic::Status>(done)
        }
    });
    let empty = server.anonymous_memory();
    let loaded = models.load(load("nano-block")).await.expect("it is loaded").into_inner();
    assert_eq!(loaded.model.expect("a model").name, "nano-block");
    let taken = loaded.memory.expect("a budget").taken_bytes - memory.taken_bytes;
    let full = server.anonymous_memory();
    // That it is there already is no error.
    models.load(load("nano-block")).await.expect("it is there");
    assert_eq!(finish(begin(channel.clone(), of("nano-block", 8)).await.expect("it serves")).await.expect("it ends"), 8);
    let both = list(&mut models).await;
    assert_eq!(both.models.iter().map(|model| model.name.as_str()).collect::<Vec<_>>(), ["nano", "nano-block"]);
    assert_eq!(both.loadable, ["nano-ar"]);
    let http = tokio::net::TcpStream::connect(server.http).await.expect("it listens");
    let (_, _, shown) = exchange(http, "GET /v1/models HTTP/1.1").await;
    let shown: serde_json::Value = serde_json::from_str(&shown).expect("JSON");
    let states = shown["data"].as_array().expect("models").iter();
    let states: Vec<_> = states.map(|model| (model["id"].as_str(), model["lacuna"]["state"].as_str())).collect();
    assert_eq!(states, [(Some("nano"), Some("ready")), (Some("nano-block"), Some("ready"))], "HTTP shows the same");
    let weights = both.models[1].weight_bytes;
    assert!(taken > weights, "{taken} bytes are counted for {weights} of weights and their tokens");

    // What runs when a model goes runs to its end; what comes then is told to come again.
    let running = begin(channel.clone(), of("nano-block", 200)).await.expect("it begins");
    let leaving = tokio::spawn({
        let mut models = models.clone();
        async move { models.unload(unload("nano-block")).await }
    });
    let away = loop {
        let listed = list(&mut models).await;
        match listed.models.iter().find(|model| model.name == "nano-block") {
            Some(model) if model.state() == ModelState::Unloading => break listed,
            Some(_) => tokio::task::yield_now().await,
            None => panic!("it went, and a request was running"),
        }
    };
    assert_eq!(away.models[0].name, "nano");
    for refused in [
        begin(channel.clone(), of("nano-block", 4)).await.expect_err("it goes"),
        models.load(load("nano-block")).await.expect_err("it goes"),
        models.unload(unload("nano-block")).await.expect_err("it goes"),
    ] {
        assert_eq!(refused.code(), Code::Unavailable, "{refused:?}");
        assert!(refused.get_details_retry_info().is_some(), "{refused:?}");
    }
    assert_eq!(finish(running).await.expect("it ends well"), 200);
    let left = leaving.await.expect("no panic").expect("it is unloaded").into_inner();
    assert_eq!(left.memory.expect("a budget").taken_bytes, memory.taken_bytes);
    let after = server.anonymous_memory();
    println!("anonymous memory: {empty} before, {full} with it, {after} after; {weights} of weights");
    assert!(full > empty + weights / 2, "loading took {} of {weights}", full.saturating_sub(empty));
    let freed = begun(|| full.saturating_sub(server.anonymous_memory()) > weights / 2).await;
    let line = server.logged("\"unloaded by request\"");
    assert!(line.contains("\"freed\":true"), "{line}");
    assert!(freed, "{empty} before, {full} with it, {} after", server.anonymous_memory());

    stop.send(true).expect("it is running");
    assert!(traffic.await.expect("no panic").expect("nobody was disturbed") > 0);
    // The default model goes too, where another takes its place.
    let only = models.unload(unload("nano")).await.expect_err("it is the only one");
    assert_eq!(only.code(), Code::FailedPrecondition, "{only:?}");
    models.load(load("nano-ar")).await.expect("it is loaded");
    models.unload(unload("nano")).await.expect("another is there");
    let listed = list(&mut models).await;
    assert_eq!((listed.models[0].name.as_str(), listed.models.len()), ("nano-ar", 1));
    models.load(load("nano")).await.expect("it comes back");
    server.stop();
}

/// Whether something comes true soon.
async fn begun(is: impl Fn() -> bool) -> bool {
    for _ in 0..500 {
        if is() {
            return true;
        }
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    false
}

#[tokio::test(flavor = "multi_thread")]
async fn a_budget_is_kept_and_names_are_no_paths() {
    let server =
        Server::start(&["--model-folder", "models", "--memory-budget", "62MiB", "--max-tokens", "2048", "--threads", "1"]);
    let mut models = ModelsClient::new(server.channel().await);
    let status = models.load(load("nano-ar")).await.expect_err("there is no room");
    assert_eq!(status.code(), Code::ResourceExhausted, "{status:?}");
    for part in ["there is no room for nano-ar: it needs", "of the budget of 62.0 MiB are taken", "(nano "] {
        assert!(status.message().contains(part), "{part}: {}", status.message());
    }
    for name in ["../models/nano-ar", "/etc", "nano-ar/", "nothing", "."] {
        let status = models.load(load(name)).await.expect_err("it is no name");
        assert_eq!(status.code(), Code::NotFound, "{name}: {status:?}");
    }
    assert_eq!(models.load(load("")).await.expect_err("it is no name").code(), Code::InvalidArgument);
    assert_eq!(list(&mut models).await.models.len(), 1);
    server.stop();
    let output =
        lacuna(&["serve", "--address", "127.0.0.1:0", "--http", "none", "--model-folder", "models", "--memory-budget", "9MiB"]);
    assert!(stderr(&output).contains("more than --memory-budget, which is 9.0 MiB"), "{}", stderr(&output));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_that_is_broken_or_not_asked_for_changes_nothing() {
    let folder = tempfile::tempdir().expect("a folder");
    let broken = folder.path().join("broken");
    std::fs::create_dir(&broken).expect("a folder");
    std::fs::write(broken.join("config.json"), "{}").expect("a file");
    let server = Server::start(&["--model-folder", path(folder.path()), "--threads", "1"]);
    let mut models = ModelsClient::new(server.channel().await);
    assert_eq!(list(&mut models).await.loadable, ["broken"]);
    let status = models.load(load("broken")).await.expect_err("it is broken");
    assert_eq!(status.code(), Code::FailedPrecondition, "{status:?}");
    let listed = list(&mut models).await;
    assert_eq!((listed.models.len(), listed.loadable.len()), (1, 1));
    server.stop();
    let server = Server::start(&["--threads", "1"]);
    let mut models = ModelsClient::new(server.channel().await);
    let status = models.load(load("nano-ar")).await.expect_err("no folder was named");
    assert_eq!(status.code(), Code::FailedPrecondition, "{status:?}");
    assert!(status.message().contains("--model-folder"), "{status:?}");
    let listed = list(&mut models).await;
    assert!(listed.loadable.is_empty() && listed.memory.is_none());
    server.stop();
}
