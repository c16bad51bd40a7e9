/* While the app does not answer, the page says so; and a panel that waits asks again, since its answer may be lost. */
(function () {
  "use strict";
  const AGAIN = 30_000; // milliseconds: panels ask sooner by themselves, but only once they were answered
  const LOOK = 2_000; // and between two looks at whether the app is there again
  const fetched = window.fetch;
  let silent = false;

  function say(words) {
    const props = { title: "The app does not answer", color: "red", children: words };
    const alarm = words && { namespace: "dash_mantine_components", type: "Alert", props };
    window.dash_clientside.set_props("alarm", { children: alarm });
  }

  function askAgain() {
    document.querySelectorAll('.note.pending [data-act="cancel"]').forEach(function (button) {
      const panel = { type: "act", of: button.dataset.of, view: button.dataset.view };
      window.dash_clientside.set_props(panel, { data: { do: "again", at: Date.now() } });
    });
  }

  /* The clock that looks at the store rests while it is not answered: this makes it look now. */
  function look() {
    window.setTimeout(function () {
      if (!silent) return;
      window.dash_clientside.set_props("watch", { n_intervals: Date.now() });
      look();
    }, LOOK);
  }

  window.fetch = async function (asked, ...how) {
    const ours = String(asked && asked.url ? asked.url : asked).includes("/_dash-update-component");
    try {
      const answer = await fetched.call(this, asked, ...how);
      if (ours && silent) { silent = false; say(null); askAgain(); }
      return answer;
    } catch (error) {
      if (ours && !silent) { silent = true; say("What you see is as it was. Is moescope app still running?"); look(); }
      throw error;
    }
  };
  window.setInterval(() => { if (!silent) askAgain(); }, AGAIN);
})();
