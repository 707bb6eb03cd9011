//! The models that are served: found by name, and where a [`Library`] allows it, loaded and unloaded while the others go on.
//!
//! A model is named here from the moment that its loading begins until its memory is free, so that what all of them take can be
//! summed up; requests find it only in between. What it is and how it runs is the engine's business.

use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::{Duration, Instant};

use tokio::sync::Semaphore;
use tonic::Status;
use tracing::{info, warn};

use super::library::{Library, need_of};
use super::{ServeError, ServeOptions, Served, lifecycle, models, proto, status};
use crate::engine::Engine;
use crate::engine::memory::Need;
use crate::telemetry::Metrics;

/// How often an engine that is to end is looked at.
const LOOK: Duration = Duration::from_millis(5);
/// How long an engine may take to end once it is told to, and to free its memory once nobody has a handle on it.
const END_TIME_MAX: Duration = Duration::from_secs(10);

/// The served models. At least one serves requests at any time.
pub struct Registry {
    models: RwLock<Vec<Entry>>,
    limits: proto::Limits,
    /// Whether prompts may stand in the log.
    pub log_prompts: bool,
    metrics: Arc<Metrics>,
    /// Tokenising and templating take a core each; more at once would only take the cores from the engine.
    checks: Arc<Semaphore>,
    drain_timeout: Duration,
    library: Option<Library>,
    /// Models are loaded one by one: two at once would only take longer each.
    loading: Semaphore,
}

struct Entry {
    name: String,
    /// What it counts for in the budget.
    bytes: u64,
    state: State,
}

enum State {
    Loading,
    Ready(Served),
    /// With its engine, until that has come to rest.
    Unloading(Option<Engine>),
}

impl Entry {
    fn ready(&self) -> Option<&Served> {
        match &self.state {
            State::Ready(served) => Some(served),
            State::Loading | State::Unloading(_) => None,
        }
    }

    fn engine(&self) -> Option<&Engine> {
        match &self.state {
            State::Ready(served) => Some(&served.engine),
            State::Unloading(engine) => engine.as_ref(),
            State::Loading => None,
        }
    }

    /// Why it serves no request.
    fn away(&self) -> Status {
        let doing = if matches!(self.state, State::Loading) { "loading" } else { "unloading" };
        status::unavailable(format!("model: {} is {doing}: try again later", self.name))
    }
}

impl Registry {
    /// The first model is the default one.
    pub fn new(models: Vec<Served>, options: &ServeOptions) -> Result<Self, ServeError> {
        if models.is_empty() {
            return Err(ServeError::NoModel);
        }
        for (at, model) in models.iter().enumerate() {
            if models[..at].iter().any(|other| other.info.name == model.info.name) {
                return Err(ServeError::SameName(model.info.name.clone()));
            }
        }
        let entry = |served: Served| {
            let (name, bytes) = (served.info.name.clone(), need_of(&served).bytes());
            Entry { name, bytes, state: State::Ready(served) }
        };
        models.iter().for_each(|model| options.telemetry.metrics.watch(&model.info, &model.engine));
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Ok(Self {
            models: RwLock::new(models.into_iter().map(entry).collect()),
            limits: models::limits(options),
            log_prompts: options.log_prompts,
            metrics: options.telemetry.metrics.clone(),
            checks: Arc::new(Semaphore::new(cores)),
            drain_timeout: options.drain_timeout,
            library: options.library.clone(),
            loading: Semaphore::new(1),
        })
    }

    fn read(&self) -> RwLockReadGuard<'_, Vec<Entry>> {
        self.models.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Vec<Entry>> {
        self.models.write().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn limits(&self) -> proto::Limits {
        self.limits
    }

    /// Those that serve requests, the default one first.
    pub fn all(&self) -> Vec<Served> {
        self.read().iter().filter_map(Entry::ready).cloned().collect()
    }

    /// A model by its name; the default one if `name` is empty.
    pub fn find(&self, name: &str) -> Result<Served, Status> {
        let models = self.read();
        let mut named = models.iter().filter(|entry| entry.name == name || (name.is_empty() && entry.ready().is_some()));
        match named.next() {
            Some(entry) => entry.ready().cloned().ok_or_else(|| entry.away()),
            None => {
                let known: Vec<_> = models.iter().map(|entry| entry.name.as_str()).collect();
                Err(status::unknown_model(name, &known.join(", ")))
            }
        }
    }

    /// Names and states of those that do not serve requests, or not any more.
    pub fn away(&self) -> Vec<(String, proto::ModelState)> {
        let away = |entry: &Entry| match entry.state {
            State::Ready(_) => None,
            State::Loading => Some((entry.name.clone(), proto::ModelState::Loading)),
            State::Unloading(_) => Some((entry.name.clone(), proto::ModelState::Unloading)),
        };
        self.read().iter().filter_map(away).collect()
    }

    /// Names that may be loaded.
    pub async fn loadable(&self) -> Result<Vec<String>, Status> {
        let Some(library) = self.library.clone() else { return Ok(vec![]) };
        let mut names = self.off_thread(move || library.names()).await?;
        let models = self.read();
        names.retain(|name| !models.iter().any(|entry| entry.name == *name));
        Ok(names)
    }

    /// What models may take together, where they are loaded by request.
    pub fn memory(&self) -> Option<proto::Memory> {
        let budget_bytes = self.library.as_ref()?.budget();
        Some(proto::Memory { budget_bytes, taken_bytes: self.read().iter().map(|entry| entry.bytes).sum() })
    }

    /// Takes no further requests.
    pub fn drain(&self) {
        // A model that is loading now finds no place any more.
        self.loading.close();
        self.read().iter().filter_map(Entry::engine).for_each(Engine::drain);
    }

    /// Ends all requests.
    pub fn stop(&self) {
        self.read().iter().filter_map(Entry::engine).for_each(Engine::stop);
    }

    /// Whether the server takes no further requests.
    pub fn draining(&self) -> bool {
        self.loading.is_closed()
    }

    /// For the end of a process.
    pub fn rest(&self) {
        let engines: Vec<Engine> = self.read().iter().filter_map(Entry::engine).cloned().collect();
        engines.into_iter().for_each(Engine::rest);
    }

    /// Loads a model by its name, warms it up and puts it in service. Goes on when nobody waits for it any more.
    pub async fn load(self: &Arc<Self>, name: &str) -> Result<Served, Status> {
        let Some(library) = self.library.clone() else { return Err(status::no_library()) };
        if let Some(entry) = self.read().iter().find(|entry| entry.name == name) {
            return entry.ready().cloned().ok_or_else(|| entry.away());
        }
        let (registry, name) = (self.clone(), name.to_owned());
        let task = tokio::spawn(async move {
            let _turn = registry.loading.acquire().await.map_err(|_| status::stopping())?;
            let (shelf, wanted) = (library.clone(), name.clone());
            let Some((path, need)) = registry.off_thread(move || shelf.measure(&wanted)).await?.map_err(status::unloadable)?
            else {
                return Err(status::not_in_library(&name));
            };
            let need = registry.reserve(&name, need, &library)?;
            let started = Instant::now();
            match registry.bring(&library, path, &need).await {
                Ok(served) => {
                    info!(model = name, seconds = started.elapsed().as_secs_f64(), bytes = need.bytes(), "loaded by request");
                    Ok(served)
                }
                Err(failed) => {
                    warn!(model = name, reason = failed.message(), "loading by request failed");
                    registry.write().retain(|entry| entry.name != name);
                    Err(failed)
                }
            }
        });
        task.await.map_err(|_| status::fault("loading a model panicked", None))?
    }

    /// Takes a place in the budget, with as many tokens as there is room for.
    fn reserve(&self, name: &str, need: Need, library: &Library) -> Result<Need, Status> {
        let mut models = self.write();
        if let Some(entry) = models.iter().find(|entry| entry.name == name) {
            return Err(entry.away());
        }
        let taken: Vec<_> = models.iter().map(|entry| (entry.name.as_str(), entry.bytes)).collect();
        let need = need.within(name, Some(library.budget()), &taken).map_err(status::no_room)?;
        models.push(Entry { name: name.into(), bytes: need.bytes(), state: State::Loading });
        Ok(need)
    }

    async fn bring(&self, library: &Library, path: std::path::PathBuf, need: &Need) -> Result<Served, Status> {
        let (library, tokens) = (library.clone(), need.tokens);
        // Not one of the checks: those take milliseconds.
        let load = tokio::task::spawn_blocking(move || library.load(&path, tokens));
        let served = load.await.map_err(|_| status::fault("loading a model panicked", None))?.map_err(status::unloadable)?;
        lifecycle::warm_one(&served).await.map_err(status::unloadable)?;
        let mut models = self.write();
        if self.draining() {
            served.engine.clone().rest();
            return Err(status::stopping());
        }
        if let Some(entry) = models.iter_mut().find(|entry| entry.name == served.info.name) {
            self.metrics.watch(&served.info, &served.engine);
            entry.bytes = need_of(&served).bytes();
            entry.state = State::Ready(served.clone());
        }
        Ok(served)
    }

    /// Takes a model out of service, lets its requests end, and frees its memory. Goes on when nobody waits for it any more.
    pub async fn unload(self: &Arc<Self>, name: &str) -> Result<(), Status> {
        if self.library.is_none() {
            return Err(status::no_library());
        }
        let engine = self.take_out(name)?;
        let (registry, name) = (self.clone(), name.to_owned());
        let task = tokio::spawn(async move {
            let started = Instant::now();
            engine.drain();
            if !until(registry.drain_timeout, || engine.active() == 0).await {
                info!(model = name, "the drain timeout passed: ending what still runs");
                engine.stop();
                until(END_TIME_MAX, || engine.active() == 0).await;
            }
            let readings = engine.readings();
            // The last handles but those of calls that are about to end.
            drop(engine);
            registry
                .write()
                .iter_mut()
                .filter(|entry| entry.name == name)
                .for_each(|entry| entry.state = State::Unloading(None));
            let freed = until(END_TIME_MAX, || readings.take().is_none()).await;
            registry.write().retain(|entry| entry.name != name);
            tokio::task::spawn_blocking(crate::tensor::give_back_memory);
            info!(model = name, seconds = started.elapsed().as_secs_f64(), freed, "unloaded by request");
        });
        task.await.map_err(|_| status::fault("unloading a model panicked", None))
    }

    /// From here on no request finds it.
    fn take_out(&self, name: &str) -> Result<Engine, Status> {
        let mut models = self.write();
        let others = models.iter().filter(|entry| entry.name != name && entry.ready().is_some()).count();
        let known: Vec<_> = models.iter().map(|entry| entry.name.clone()).collect();
        let Some(entry) = models.iter_mut().find(|entry| entry.name == name) else {
            return Err(status::unknown_model(name, &known.join(", ")));
        };
        let Some(served) = entry.ready() else { return Err(entry.away()) };
        if others == 0 {
            return Err(status::unable(format!("name: {name} is the only model that is served, and stays")));
        }
        let engine = served.engine.clone();
        entry.state = State::Unloading(Some(engine.clone()));
        Ok(engine)
    }

    /// Runs work that takes milliseconds of a core, off the threads that serve the network.
    pub async fn off_thread<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> Result<T, Status> {
        let permit = self.checks.clone().acquire_owned().await.map_err(|_| status::fault("the checks are closed", None))?;
        let work = tokio::task::spawn_blocking(move || {
            // Kept by the work itself: a caller that gives up does not stop it.
            let _permit = permit;
            work()
        });
        work.await.map_err(|_| status::fault("a check panicked", None))
    }
}

/// Waits for something to become true; false if it does not in time.
async fn until(time: Duration, is: impl Fn() -> bool) -> bool {
    let begun = Instant::now();
    while !is() {
        if begun.elapsed() >= time {
            return false;
        }
        tokio::time::sleep(LOOK).await;
    }
    true
}
