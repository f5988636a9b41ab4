const read = (id) => document.getElementById(id)?.textContent ?? "";

// The libraries are carried compressed; the browser unpacks them and runs them from its memory.
const library = async (id) => {
  const bytes = Uint8Array.from(atob(read(id)), (letter) => letter.charCodeAt(0));
  const script = await new Response(
    new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))
  ).text();
  return import(URL.createObjectURL(new Blob([script], { type: "text/javascript" })));
};

const shown = (value, kind) => {
  if (kind !== "display" || value === null || Number.isInteger(value)) return value;
  return Math.abs(value) < 1e-3 ? value.toExponential(2) : value.toPrecision(4);
};

const { jQuery } = await library("datatables");
const text = jQuery.fn.dataTable.render.text();
const plain = { autoWidth: false, info: false, order: [], ordering: true, searching: false };

document.querySelectorAll("table.sortable").forEach((table) => {
  const paging = table.rows.length > 101;
  jQuery(table).DataTable({ ...plain, paging, searching: paging, info: paging, pageLength: 25 });
});

if (read("points-data")) {
  const { fields, rows } = JSON.parse(read("points-data"));
  jQuery("#all-points").DataTable({
    ...plain,
    columns: fields.map(({ title, numeric }, data) =>
      numeric
        ? { title: text.display(title), data, render: shown, className: "number", type: "num" }
        : { title: text.display(title), data, render: text }
    ),
    columnDefs: [
      { targets: "_all", defaultContent: "" },
      { targets: fields.findIndex(({ hidden }) => hidden), visible: false },
    ],
    data: rows,
    deferRender: true,
    info: true,
    pageLength: 25,
    searching: true,
  });
}

if (read("chart")) {
  await library("vega");
  const chart = JSON.parse(read("chart"));
  const { rows } = JSON.parse(read("points-data"));
  chart.datasets = { points: rows };
  const renderer = rows.length > 3000 ? "canvas" : "svg";
  await window.vegaEmbed("#scatter", chart, { actions: false, ast: true, renderer });
}
document.documentElement.dataset.ready = "yes";
