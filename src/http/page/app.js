// Says whether the server is ready.
const answer = await fetch("/health");
document.getElementById("health").textContent = (await answer.json()).status;
