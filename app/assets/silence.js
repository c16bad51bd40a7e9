/* While the app does not answer, the page says so; and a panel that waits, or was not heard, asks again. */
(function () {
  "use strict";
  const AGAIN = 30_000; // milliseconds: panels ask sooner by themselves, but only once they were answered
  const LOOK = 2_000; // and between two looks at whether the app is there again
  const fetched = window.fetch;
  const lost = new Set(); // the panels that were not answered
  let silent = false;

  function say(words) {
    const props = { title: "The app does not answer", color: "red", children: words };
    const alarm = words && { namespace: "dash_mantine_components", type: "Alert", props };
    window.dash_clientside.set_props("alarm", { children: alarm });
  }

  /* Which panel it was that asked: for what it shows, or for rows of its table. */
  function lose(question) {
    for (const prop of JSON.parse(question).changedPropIds) {
      const asks = /^({.*"type":"(?:wanted|tick|act)".*})\.|^({.*"type":"grid".*})\.getRowsRequest$/.exec(prop);
      if (!asks) continue;
      const { of, view } = JSON.parse(asks[1] || asks[2]);
      lost.add(JSON.stringify({ of, type: "body", view }));
    }
  }

  function askAgain() {
    document.querySelectorAll(".panel").forEach(function (panel) {
      const body = panel.querySelector('[id*=\'"type":"body"\']');
      if (!body || !(lost.has(body.id) || panel.querySelector('.note.pending [data-act="cancel"]'))) return;
      window.dash_clientside.set_props({ ...JSON.parse(body.id), type: "act" }, { data: { do: "again", at: Date.now() } });
    });
    lost.clear();
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
      if (ours) lose(how[0].body);
      if (ours && !silent) { silent = true; say("What you see is as it was. Is moescope app still running?"); look(); }
      throw error;
    }
  };
  window.setInterval(() => { if (!silent) askAgain(); }, AGAIN);
})();
