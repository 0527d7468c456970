// Formats a job's state and numbers as text.

import { el } from "../shared/dom.mjs";
import { hasEnded } from "./words.mjs";

/** Texts by the run's status. A test compares the names with the server's. */
export const ICONS = {
    waiting: "pi-clock",
    loading: "pi-spin pi-spinner",
    running: "pi-play",
    paused: "pi-pause",
    finished: "pi-check-circle",
    stopped: "pi-stop-circle",
    failed: "pi-times-circle",
    interrupted: "pi-exclamation-circle",
    unreadable: "pi-question-circle",
};

export const icon = (name) => el("i", { className: `pi ${name}`, ariaHidden: "true" });

export function stateOf(job) {
    const { status } = job;
    const waits = status === "paused" && !job.pause_requested;
    const place = job.in_line && status === "waiting" ? `${status}, ${job.in_line}` : status;
    const text = waits ? "waits for the queue" : job.pause_requested && !hasEnded(job) ? "paused" : place;
    return el("span", { className: `kl-state kl-${status}` }, icon(ICONS[status] ?? "pi-circle"), ` ${text}`);
}

export function duration(seconds) {
    if (seconds < 1) return `${Math.round(seconds * 1000)} ms`;
    if (seconds < 100) return `${Number(seconds.toPrecision(2))} s`;
    const minutes = Math.round(seconds / 60);
    return minutes < 60 ? `${minutes} min` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

export function size(bytes) {
    const power = Math.min(Math.floor(Math.log2(Math.max(bytes, 1)) / 10), 3);
    return `${Number((bytes / 1024 ** power).toPrecision(3))} ${["B", "KiB", "MiB", "GiB"][power]}`;
}

export const steps = (job) => (job.total ? `${job.done} / ${job.total}` : "not begun");

export const timeLeft = (job) =>
    job.seconds_left === null || hasEnded(job) ? "" : `${duration(job.seconds_left)} left`;

export function bar(job) {
    const done = job.total ? (job.done / job.total) * 100 : 0;
    const inner = el("div", { className: `kl-${job.status}`, style: { width: `${done}%` } });
    return el("div", { className: "kl-progress" }, inner);
}

export function button(label, iconName, title, onclick) {
    return el("button", { type: "button", title, onclick }, icon(iconName), label && ` ${label}`);
}
