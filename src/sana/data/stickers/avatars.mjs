// Draws portraits with DiceBear and writes one JSON line each: look, attributes in caption words, SVG.
// Usage: node avatars.mjs OUTPUT COUNT, in a folder whose node_modules holds @dicebear/core and
// @dicebear/collection. The same COUNT gives the same file: every choice comes from one seeded generator.
import { writeFileSync } from "node:fs";
import { createAvatar } from "@dicebear/core";
import { micah, openPeeps, personas, toonHead } from "@dicebear/collection";

let state = 20240607;
function random() {
  state = (state + 0x6d2b79f5) | 0;
  let t = Math.imul(state ^ (state >>> 15), 1 | state);
  t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
  return ((t ^ (t >>> 14)) >>> 0) / 4294967296;
}
const chance = (share) => random() < share;
const pick = (list) => list[Math.floor(random() * list.length)];
const pickEntry = (table) => pick(Object.entries(table));

const CLOTHES = {
  red: "e0403f", orange: "f58220", yellow: "f7cf3d", green: "3fa652", blue: "2f6fed",
  purple: "7d4fd3", pink: "f276ad", brown: "8a5a3c", black: "2b2a33", white: "f4f4f6", gray: "9a9da8",
};
const HAIR = {
  black: "231d1f", brown: "6b4126", blonde: "e8c063", red: "c24a22", gray: "a9abb5",
  white: "eeeef2", blue: "3d7de8", pink: "ee72b0", purple: "8656cf", green: "43a361",
};
const SKIN = { light: "f6cfb5", tan: "dfa478", brown: "ad6c46", dark: "6b4230" };
const FRAMES = { black: "1f1d22", red: "d83a3a", blue: "2f6fed", yellow: "eebf2f" };

// Natural colours of hair come up twice as often as dyed ones.
const hairColor = () => pick([..."black brown blonde red gray".split(" "), ...Object.keys(HAIR)]);

function person(hair, beard) {
  if (beard) return "man";
  return hair.feminine === undefined ? "person" : hair.feminine ? "woman" : "man";
}
const w = (words) => ({ words, feminine: true });
const m = (words) => ({ words, feminine: false });
const n = (words) => ({ words });

const PERSONAS_HAIR = {
  long: w("long hair"), extraLong: w("very long hair"), bobCut: w("a bob"), bobBangs: w("a bob with bangs"),
  pigtails: w("pigtails"), straightBun: w("a bun and a headband"), curlyBun: w("a curly bun and a headband"),
  curly: n("big curly hair"), sideShave: w("side-swept long hair"), curlyHighTop: m("short curly hair"),
  shortCombover: m("short hair"), shortComboverChops: m("short hair and sideburns"), fade: m("a fade haircut"),
  bunUndercut: m("a man bun"), mohawk: m("a small top knot"), balding: m("a receding hairline"), buzzcut: m("a buzz cut"),
  bald: m("no hair"), cap: n("cap"), beanie: n("beanie"),
};
function drawPersonas() {
  const [style, hair] = pickEntry(PERSONAS_HAIR);
  const tone = pick(Object.keys(SKIN));
  const color = hairColor();
  const clothing = pick(Object.keys(CLOTHES));
  const [body, garment] = pickEntry({ squared: "sweater", rounded: "t-shirt", checkered: "checkered shirt" });
  const [mouth, mood] = pickEntry({ smile: "smiling", bigSmile: "laughing", frown: "sad", surprise: "surprised", smirk: "smirking" });
  const [eyes, gaze] = chance(0.5) ? ["open", null] : pickEntry({ wink: "winking", sleep: "closed", happy: "happy", glasses: "square glasses", sunglasses: "sunglasses" });
  const beard = hair.feminine !== true && chance(0.4)
    ? pickEntry({ beardMustache: "full beard", walrus: "moustache", goatee: "goatee", pyramid: "thick moustache" }) : null;
  const words = { person: person(hair, beard), skin: tone, expression: mood, clothing: garment, clothing_color: clothing };
  if (style === "cap") Object.assign(words, { headwear: "cap", headwear_color: "orange" });
  else if (style === "beanie") Object.assign(words, { headwear: "beanie", headwear_color: "red" });
  else if (style === "bald") words.hair = "bald head";
  else Object.assign(words, { hair: hair.words }, style === "buzzcut" ? {} : { hair_color: color });
  if (gaze && gaze.includes("glasses")) words.glasses = gaze;
  else if (gaze) words.eyes = { winking: "winking", closed: "closed eyes", happy: "happy eyes" }[gaze];
  if (beard) Object.assign(words, { beard: beard[1], beard_color: color });
  return ["flat cartoon", words, personas, {
    hair: [style], body: [body], mouth: [mouth], eyes: [eyes], nose: ["mediumRound"],
    facialHair: beard ? [beard[0]] : [], facialHairProbability: beard ? 100 : 0,
    hairColor: [HAIR[color]], clothingColor: [CLOTHES[clothing]], skinColor: [SKIN[tone]],
  }];
}

const MICAH_HAIR = {
  full: w("long wavy hair"), pixie: w("a bob"), fonze: m("a quiff"), mrT: m("a mohawk"),
  dougFunny: m("thin hair"), mrClean: m("no hair"), dannyPhantom: n("medium hair with bangs"), turban: n("turban"),
};
function drawMicah() {
  const [style, hair] = pickEntry(MICAH_HAIR);
  const tone = pick(Object.keys(SKIN));
  const color = hairColor();
  const cloth = style === "turban" ? pick(Object.keys(CLOTHES)) : null;
  const clothing = pick(Object.keys(CLOTHES));
  const [shirt, garment] = pickEntry({ open: "sweater", crew: "t-shirt", collared: "collared shirt" });
  const beard = hair.feminine !== true && chance(0.35) ? pickEntry({ beard: "full beard", scruff: "stubble" }) : null;
  const [mouth, mood] = pickEntry(beard && beard[0] === "beard"
    ? { laughing: "laughing", smile: "smiling", surprised: "surprised" }
    : { laughing: "laughing", smile: "smiling", surprised: "surprised", sad: "sad", nervous: "nervous", pucker: "kissing" });
  const glasses = chance(0.4) ? pickEntry({ round: "round glasses", square: "square glasses" }) : null;
  const frame = pick(Object.keys(FRAMES));
  const earring = chance(0.3) ? pickEntry({ hoop: "hoop earrings", stud: "stud earrings" }) : null;
  const words = { person: person(hair, beard), skin: tone, expression: mood, clothing: garment, clothing_color: clothing };
  if (cloth) Object.assign(words, { headwear: "turban", headwear_color: cloth });
  else if (style === "mrClean") words.hair = "bald head";
  else Object.assign(words, { hair: hair.words, hair_color: color });
  if (glasses) Object.assign(words, { glasses: glasses[1], glasses_color: frame });
  if (earring) words.jewelry = earring[1];
  if (beard) Object.assign(words, { beard: beard[1], beard_color: color });
  return ["outlined cartoon", words, micah, {
    hair: [style], hairProbability: 100, shirt: [shirt], mouth: [mouth], eyebrows: [mouth === "sad" || mouth === "nervous" ? "down" : "up"],
    eyes: [mouth === "laughing" ? "smiling" : "eyes"], nose: ["curve"], ears: ["attached"],
    glasses: glasses ? [glasses[0]] : [], glassesProbability: glasses ? 100 : 0, glassesColor: [FRAMES[frame]],
    earrings: earring ? [earring[0]] : [], earringsProbability: earring ? 100 : 0, earringColor: ["f2c531"],
    facialHair: beard ? [beard[0]] : [], facialHairProbability: beard ? 100 : 0, facialHairColor: [HAIR[color]],
    hairColor: [cloth ? CLOTHES[cloth] : HAIR[color]], shirtColor: [CLOTHES[clothing]], baseColor: [SKIN[tone]],
    eyebrowsColor: ["1f1a1a"], eyesColor: ["1f1a1a"], mouthColor: ["1f1a1a"], eyeShadowColor: ["ffffff"],
  }];
}

const TOON_HAIR = [
  ["sideComed", null, m("short hair")], ["undercut", null, m("an undercut")], ["spiky", null, m("spiky hair")],
  ["bun", null, w("a bun")], ["sideComed", "longStraight", w("long straight hair")],
  ["sideComed", "longWavy", w("long wavy hair")], ["sideComed", "shoulderHigh", w("shoulder-length hair")],
  ["sideComed", "neckHigh", w("a bob")], ["bun", "longStraight", w("a bun and long straight hair")],
  ["spiky", "neckHigh", n("spiky medium hair")], [null, null, m("bald head")],
];
const TOON_MOODS = [
  ["laughing", "laugh", "happy", "happy"], ["smiling", "smile", "happy", "happy"], ["smiling", "smile", "neutral", "happy"],
  ["angry", "angry", "angry", "happy"], ["sad", "sad", "sad", "humble"], ["surprised", "agape", "raised", "wide"],
  ["winking", "laugh", "happy", "wink"], ["happy with closed eyes", "laugh", "happy", "bow"],
];
function drawToon() {
  const [front, rear, hair] = pick(TOON_HAIR);
  const tone = pick(Object.keys(SKIN));
  const color = hairColor();
  const clothing = pick(Object.keys(CLOTHES));
  const [mood, mouth, brows, eyes] = pick(TOON_MOODS);
  const beard = hair.feminine === false && chance(0.5)
    ? pickEntry({ moustacheTwirl: "curly moustache", fullBeard: "full beard", longBeard: "long beard", chinMoustache: "goatee" }) : null;
  const clothes = pickEntry(hair.feminine && chance(0.4) ? { dress: "dress" }
    : { turtleNeck: "turtleneck", openJacket: "open jacket", shirt: "sweater over a shirt", tShirt: "t-shirt" });
  const words = { person: person(hair, beard), skin: tone, expression: mood, clothing: clothes[1], clothing_color: clothing, hair: hair.words };
  if (front) words.hair_color = color;
  if (beard) Object.assign(words, { beard: beard[1], beard_color: color });
  return ["cartoon", words, toonHead, {
    hair: front ? [front] : [], hairProbability: front ? 100 : 0, rearHair: rear ? [rear] : [], rearHairProbability: rear ? 100 : 0,
    clothes: [clothes[0]], mouth: [mouth], eyebrows: [brows], eyes: [eyes],
    beard: beard ? [beard[0]] : [], beardProbability: beard ? 100 : 0,
    hairColor: [HAIR[color]], clothesColor: [CLOTHES[clothing]], skinColor: [SKIN[tone]],
  }];
}

// Heads whose hair takes the contrast colour; the others are drawn in black ink.
const PEEPS_DYED = {
  bangs: w("shoulder-length hair with bangs"), grayBun: w("a bun"), grayMedium: w("hair tied back"), grayShort: m("short hair"),
  mediumBangs2: w("curly hair with bangs"), mohawk: m("a mohawk"), short4: m("a quiff"),
};
const PEEPS_BLACK = {
  afro: n("an afro"), bangs2: w("a bob with bangs"), bantuKnots: n("bantu knots"), buns: w("many buns"),
  cornrows2: w("braids"), dreads1: n("dreadlocks"), flatTop: m("a flat top"), long: w("long wavy hair"), longBangs: w("long hair with bangs"),
  longCurly: w("long curly hair"), medium3: w("shoulder-length hair"), mediumStraight: w("long straight hair"), pomp: m("a pompadour"),
  short1: m("short hair"), short5: m("spiky hair"), twists: n("twisted hair"), noHair1: m("bald head"),
  hatBeanie: n("beanie"), hatHip: n("wide hat"), hijab: w("hijab"), turban: n("turban"),
};
const PEEPS_HATS = { hatBeanie: ["beanie", null], hatHip: ["wide-brimmed hat", "black"], hijab: ["hijab", "black"], turban: ["turban", null] };
function drawPeeps() {
  const dyed = chance(0.4);
  const [head, hair] = pickEntry(dyed ? PEEPS_DYED : PEEPS_BLACK);
  const tone = pick(Object.keys(SKIN));
  const color = dyed ? hairColor() : "black";
  const clothing = pick(Object.keys(CLOTHES).filter((name) => name !== "black"));
  const [face, mood] = pickEntry({ smile: "smiling", smileBig: "grinning", smileLOL: "laughing", lovingGrin1: "in love", awe: "amazed",
    calm: "calm", serious: "serious", solemn: "sad", tired: "tired", veryAngry: "angry", rage: "furious", concerned: "worried" });
  const beard = hair.feminine !== true && chance(0.4)
    ? pickEntry({ full: "full beard", full3: "big beard", goatee2: "goatee", moustache3: "handlebar moustache", moustache6: "moustache" }) : null;
  const glasses = chance(0.35) ? pickEntry({ glasses2: "round glasses", glasses3: "square glasses", sunglasses: "sunglasses", eyepatch: "eyepatch" }) : null;
  const mask = !beard && chance(0.05);
  const words = { person: person(hair, beard), skin: tone, clothing: "t-shirt", clothing_color: clothing };
  if (mask) words.mask = "medical mask";
  else words.expression = mood;
  const hat = PEEPS_HATS[head];
  if (hat) Object.assign(words, { headwear: hat[0], headwear_color: hat[1] ?? clothing });
  else Object.assign(words, { hair: hair.words }, head === "noHair1" ? {} : { hair_color: color });
  if (glasses) words.glasses = glasses[1];
  if (beard) Object.assign(words, { beard: beard[1], beard_color: "black" });
  return ["hand-drawn comic", words, openPeeps, {
    head: [head], face: [face], facialHair: beard ? [beard[0]] : [], facialHairProbability: beard ? 100 : 0,
    accessories: glasses ? [glasses[0]] : [], accessoriesProbability: glasses ? 100 : 0,
    mask: mask ? ["medicalMask"] : [], maskProbability: mask ? 100 : 0,
    headContrastColor: [HAIR[color]], clothingColor: [CLOTHES[clothing]], skinColor: [SKIN[tone]],
  }];
}

const [output, count] = [process.argv[2], Number(process.argv[3])];
const lines = [];
for (let index = 0; index < count; index++) {
  const draw = [drawToon, drawPersonas, drawMicah, drawPeeps][index % 4];
  const [look, attributes, style, options] = draw();
  const svg = createAvatar(style, { seed: "sana", ...options }).toString();
  // The view box clips the drawing already; a mask that says so again would double the time to rasterise.
  const plain = svg.replace(/<metadata.*?<\/metadata>/s, "").replace('<g mask="url(#viewboxMask)">', "<g>");
  lines.push(JSON.stringify({ look, attributes, svg: plain }));
}
writeFileSync(output, lines.join("\n") + "\n");
