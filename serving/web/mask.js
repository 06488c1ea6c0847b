// What of a picture is to be painted: drawn over it by hand, or taken from a PNG that is transparent there.

const at = (id) => document.getElementById(id);
let last = null; // where the pointer was, in pixels of the picture

/** Show a picture to paint over, with what `mask`, a PNG, says is painted already. */
export async function showPainting(picture, mask = null) {
  const shown = await createImageBitmap(picture);
  for (const id of ["mask-picture", "mask-canvas"]) Object.assign(at(id), { width: shown.width, height: shown.height });
  at("mask-picture").getContext("2d").drawImage(shown, 0, 0);
  return mask ? takeMask(mask) : "";
}

/** Paint over what is transparent in a PNG; gives what is wrong with it, "" if nothing. */
export async function takeMask(file) {
  const canvas = at("mask-canvas");
  const mask = await createImageBitmap(file).catch(() => null);
  if (!mask) return "This is not a picture.";
  if (mask.width !== canvas.width || mask.height !== canvas.height)
    return `The mask has ${mask.width} × ${mask.height} pixels, the picture ${canvas.width} × ${canvas.height}.`;
  const pen = clearMask();
  pen.fillRect(0, 0, canvas.width, canvas.height);
  pen.globalCompositeOperation = "destination-out";
  pen.drawImage(mask, 0, 0);
  return isPainted() ? "" : "Nothing in it is transparent.";
}

/** Take everything back; gives the pen. */
export function clearMask() {
  const pen = at("mask-canvas").getContext("2d", { willReadFrequently: true });
  pen.globalCompositeOperation = "source-over";
  pen.clearRect(0, 0, pen.canvas.width, pen.canvas.height);
  pen.fillStyle = pen.strokeStyle = "#ff2d78";
  return pen;
}

function isPainted() {
  const { width, height } = at("mask-canvas");
  const { data } = at("mask-canvas").getContext("2d").getImageData(0, 0, width, height);
  for (let i = 3; i < data.length; i += 4) if (data[i] === 255) return true;
  return false;
}

/** The mask as a PNG of the picture's size, transparent where it is painted; null if nothing is. */
export async function paintedMask() {
  if (!isPainted()) return null;
  const { width, height } = at("mask-canvas");
  const mask = new OffscreenCanvas(width, height);
  const pen = mask.getContext("2d");
  pen.fillRect(0, 0, width, height);
  pen.globalCompositeOperation = "destination-out";
  pen.drawImage(at("mask-canvas"), 0, 0);
  return new File([await mask.convertToBlob()], "mask.png", { type: "image/png" });
}

/** Draw a line from where the pointer was. */
function paint(event) {
  const canvas = at("mask-canvas");
  const scale = canvas.width / canvas.clientWidth;
  const [x, y] = [event.offsetX * scale, event.offsetY * scale];
  const pen = canvas.getContext("2d");
  pen.globalCompositeOperation = "source-over";
  pen.strokeStyle = "#ff2d78";
  pen.lineCap = "round";
  pen.lineWidth = (Number(at("brush").value) / 100) * Math.min(canvas.width, canvas.height);
  pen.beginPath();
  pen.moveTo(...(last ?? [x, y]));
  pen.lineTo(x, y);
  pen.stroke();
  last = [x, y];
}

const stop = () => (last = null);

/** `onPainted`: called when something is painted by hand. */
export function letPaint(onPainted) {
  const canvas = at("mask-canvas");
  canvas.addEventListener("pointerdown", (event) => {
    if (event.button) return;
    canvas.setPointerCapture(event.pointerId);
    paint(event);
    onPainted();
  });
  canvas.addEventListener("pointermove", (event) => last && paint(event));
  for (const name of ["pointerup", "pointercancel"]) canvas.addEventListener(name, stop);
}
